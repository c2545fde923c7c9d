"""What an object store raises when it cannot be used, whichever library speaks to it."""

from botocore.exceptions import BotoCoreError, ClientError

STORE_ERRORS = (OSError, ValueError, BotoCoreError, ClientError)
"""fsspec turns most failures into OSError; S3 without credentials or without a reachable endpoint raises botocore's own."""
