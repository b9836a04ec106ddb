"""Operating runs: what reads a run's folder (watch, report), and what is asked before a job (doctor, plan)."""
