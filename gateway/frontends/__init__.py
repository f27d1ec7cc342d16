"""Front doors: each module here knows one HTTP server, and no other module knows it."""
