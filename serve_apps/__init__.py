"""Ray Serve applications: platform classes wrapped as deployments."""
