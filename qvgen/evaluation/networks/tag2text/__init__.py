"""Tag2Text: the captions of images by a Swin transformer, a head of tags and two BERTs."""
