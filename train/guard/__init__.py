"""What keeps a run alive or ends it: agreement of the ranks, hangs, signals, the lock of a run's folder."""
