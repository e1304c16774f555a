"""What the header of a payload is made of (docs/FORMAT.md)."""

import struct

# flags, coded classes, base (octaves), columns, and for rows and for columns bits of a code and the smallest code.
HEADER = struct.Struct("<BBhIBBBB")
CLASS = struct.Struct("<BBe")  # class, design, amplitude in 2^base
TILE = struct.Struct("<H")  # words
NOT_FINITE, ROWS, COLUMNS, APART, TURNED, PRODUCT = 1, 2, 4, 8, 16, 32
SMALLEST_PAYLOAD = HEADER.size + CLASS.size + 2 * TILE.size + 8
