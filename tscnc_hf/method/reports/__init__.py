"""What a network is like: spectra, zeros, operations, Lipschitz bounds."""
