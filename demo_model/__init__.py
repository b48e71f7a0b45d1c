"""A small, really trained ZImagePipeline that draws coloured shapes from words."""
