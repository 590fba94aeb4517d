"""The variational autoencoder behind the source RecVAE: its settings, training, numpy twin."""
