"""How samples are made: training rollouts and inference pipelines."""
