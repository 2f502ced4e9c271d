"""What the command line reports of networks, and what writes projected ones."""
