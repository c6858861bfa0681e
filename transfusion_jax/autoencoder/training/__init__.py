"""What trains an autoencoder: its losses, its step, its run."""
