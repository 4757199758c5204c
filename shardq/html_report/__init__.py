"""A picture of a result: one page of HTML without anything from elsewhere."""
