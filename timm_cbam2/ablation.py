"""`python -m timm_cbam2.ablation VERB …`: see the room of evidence."""

from .evidence.ablation.__main__ import main

if __name__ == "__main__":
    main()
