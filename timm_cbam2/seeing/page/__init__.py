"""The page that `timm-cbam2 app` serves and that a Space runs: drop a picture in, see answer and masks."""
