"""A stockroom as an MCP server, as you would write your own: `pip install mcp`, then name it in mcp.json."""

from mcp.server import MCPServer

# Boxes on the shelf, boxes that customers have been promised, pieces in a box.
PARTS = {
    "ball bearing": (40, 12, 25),
    "brake pad": (18, 5, 4),
    "drive belt": (31, 30, 1),
    "fan blade": (9, 2, 6),
    "gasket": (52, 20, 50),
    "hose clamp": (77, 13, 20),
    "oil filter": (26, 11, 2),
    "rubber foot": (64, 48, 8),
    "spark plug": (35, 17, 4),
    "wiper arm": (14, 6, 1),
}

server = MCPServer("stockroom")


@server.tool()
def find_parts(text: str) -> list[str]:
    """Names of the parts that have this text in them."""
    return [name for name in PARTS if text.lower() in name]


@server.tool()
def shelf(part: str) -> dict[str, int]:
    """What the stockroom knows of a part, by its whole name."""
    if part not in PARTS:
        raise ValueError(f"no part is called {part!r}; find_parts tells names")
    boxes, promised, pieces = PARTS[part]
    return {"boxes": boxes, "promised_boxes": promised, "pieces_per_box": pieces}


if __name__ == "__main__":
    server.run()
