"""Ray Tune campaigns, each search space beside what it searches."""
