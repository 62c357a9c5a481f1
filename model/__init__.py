"""What is predicted and what is minimised: the Wan2.1 networks, noise arithmetic and losses."""
