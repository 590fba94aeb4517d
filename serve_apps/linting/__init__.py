"""What `python -m serve_apps.lint` knows of Serve configurations; each module is a kind of rule."""
