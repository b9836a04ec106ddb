"""What a run will take before it is run: its step, its memory, its failures, its days and its price. launch/plan.py is the command."""
