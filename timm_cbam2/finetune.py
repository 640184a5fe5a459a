"""`python -m timm_cbam2.finetune …`, the form in which `accelerate launch` and torchrun start it."""

from .errors import run_commands
from .training.finetune import finetune

if __name__ == "__main__":
    run_commands(finetune)
