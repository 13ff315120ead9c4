"""Drawing of the training pictures: subjects are forms with parts, styles are ways to draw a surface."""
