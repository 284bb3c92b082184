"""ARML's theory on Gaussians."""
