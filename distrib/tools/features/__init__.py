"""What a network sees in pictures, as vectors: ``distrib features photos/ --weights RUN --output photos.npy``."""
