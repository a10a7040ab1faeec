"""Before a run: how much memory it takes, which micro-batch fits, how long it lasts."""
