"""What several methods share; the folder above holds one file per method and nothing else."""
