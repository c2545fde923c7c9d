"""`python -m geotrain.cli`."""

from geotrain.cli import main

main()
