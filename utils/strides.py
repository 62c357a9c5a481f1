"""How many pixels Wan2.1's autoencoder puts into a latent, and its transformer into a token."""

SPATIAL_STRIDE = 8  # pixels to a latent row or column
TEMPORAL_STRIDE = 4  # pixel frames to a latent frame; the first holds one: P = 1 + 4 (F - 1)
PATCH_PIXELS = 2 * SPATIAL_STRIDE  # a side's least step: patches have 2 x 2 latents
