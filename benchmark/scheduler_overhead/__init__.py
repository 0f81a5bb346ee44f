"""What our scheduler adds to an iteration of SGLang's."""
