"""`timm-cbam2 benchmark`: time and memory of networks with and without attention, side by side in one run."""
