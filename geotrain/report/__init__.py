"""What a run leaves behind and shows while it runs: the run folder, the board, the live table, the page at the end."""
