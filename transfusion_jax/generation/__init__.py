"""Text and images in any mix, written and drawn on one cache."""
