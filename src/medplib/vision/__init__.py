"""Vision towers: images in, `VisionFeatures` out. Towers have names in `VISION_TOWERS`."""
