"""The doctor: is this allocation fit for this run? `examine` measures on every rank, `judge` compares, `page` prints."""
