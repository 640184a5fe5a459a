"""`python -m timm_cbam2.finetune …`, the form in which `accelerate launch` and torchrun start it."""

from .errors import run_commands
from .seeing.observer import look_on
from .training.finetune import finetune

look_on()
if __name__ == "__main__":
    run_commands(finetune)
