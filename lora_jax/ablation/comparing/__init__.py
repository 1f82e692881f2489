"""What the results of a grid say: groups over seeds, tests, verdicts, effects of an axis."""
