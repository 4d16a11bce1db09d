"""Other systems' formats: reading them as hostile input, writing them so that their own tools open the result."""
