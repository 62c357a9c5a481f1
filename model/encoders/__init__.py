"""Text, images and video to what transformers read, and latents back to pixels."""
