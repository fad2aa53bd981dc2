"""Training of what merging is measured on and needs: classifiers, DynamicViT, vision-language models."""
