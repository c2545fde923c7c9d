"""Who is in a run, as regions are lost, come back, join and leave."""
