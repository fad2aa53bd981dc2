"""Quality and cost of merging, measured on texts, images and vision-language models."""
