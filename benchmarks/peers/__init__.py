"""What the peers do on the same models, rows and numbers; each program is run by the peer's own interpreter."""
