"""What the gateway is compared with, and the clients that measure it: each is its own program."""
