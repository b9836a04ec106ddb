import os

# Before torch is imported. Where others use the cores, too, threads that wait for each other by spinning can take a
# hundred times as long: 26 s for a step, and less than 1 s without (2026-11-28, two cores with a load of 25).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
