"""The bundled world of moving shapes: its renderer, its prompts, and a real ``WanPipeline`` with tiny widths."""
