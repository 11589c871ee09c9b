"""How kernels are compiled. All other folders take compiled functions from here."""
