"""The two photographs that ship with scikit-learn, with or without Pillow.

``sklearn.datasets.load_sample_images`` needs Pillow to decode them. So that the examples run with the
run-time packages alone, a decoder for just this kind of file (baseline JPEG, three components, no
subsampling) stands in where Pillow is missing. Use Pillow for any other.
"""

from importlib import resources

import numpy as np
from scipy.fft import idctn
from sklearn.datasets import load_sample_images


def photographs():
    """Both photographs, a list of arrays (427, 640, 3) uint8."""
    try:
        return load_sample_images().images
    except ImportError:
        folder = resources.files("sklearn.datasets.images")
        return [decode_jpeg((folder / name).read_bytes()) for name in ("china.jpg", "flower.jpg")]


def decode_jpeg(data):
    """A baseline JPEG (ITU T.81) with three components of the same size, (height, width, 3) uint8."""
    quantizers, codes, frame, position = {}, {}, None, 2
    while True:  # segments: marker, length, payload
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        payload = data[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xDB:  # quantization table
            quantizers[payload[0] & 15] = np.frombuffer(payload, np.uint8, 64, offset=1)
        elif marker == 0xC4:  # Huffman table
            codes[payload[0]] = huffman_table(payload[1:17], payload[17:])
        elif marker == 0xC0:  # start of a baseline frame: precision, height, width, components
            frame = payload
        elif marker == 0xDA:  # start of the scan, up to the end marker
            break
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    rows, columns = -(-height // 8), -(-width // 8)
    tables = [(codes[payload[2 + 2 * c] >> 4], codes[16 + (payload[2 + 2 * c] & 15)]) for c in range(3)]
    blocks = entropy_decode(data[position:-2].replace(b"\xff\x00", b"\xff"), rows * columns, tables)
    blocks *= np.array([quantizers[frame[8 + 3 * c]] for c in range(3)])  # (n_blocks, 3, 64)

    squares = np.zeros((rows * columns, 3, 64))
    squares[:, :, zigzag()] = blocks
    pixels = idctn(squares.reshape(rows, columns, 3, 8, 8), axes=(3, 4), norm="ortho") + 128
    image = pixels.transpose(0, 3, 1, 4, 2).reshape(8 * rows, 8 * columns, 3)[:height, :width]
    return ycc_to_rgb(np.clip(np.rint(image), 0, 255))


def zigzag():
    """Place in an 8 x 8 block of each coefficient, (64,)."""
    places = sorted(((i, j) for i in range(8) for j in range(8)), key=lambda p: (sum(p), p[1 - sum(p) % 2]))
    return np.array([8 * i + j for i, j in places])


def huffman_table(counts, symbols):
    """(length, symbol) for every 16 bits that begin with a code."""
    table, code, k = [(0, 0)] * 65536, 0, 0
    for length, count in enumerate(counts, start=1):
        for symbol in symbols[k : k + count]:
            first = code << (16 - length)
            table[first : first + (1 << (16 - length))] = [(length, symbol)] * (1 << (16 - length))
            code += 1
        k += count
        code <<= 1
    return table


def entropy_decode(data, n_blocks, tables):
    """Coefficients in zigzag order, (n_blocks, 3, 64)."""
    data += bytes(8)
    blocks = np.zeros((n_blocks, 3, 64))
    previous = [0, 0, 0]
    bit = 0

    def peek(n_bits):
        window = int.from_bytes(data[bit >> 3 : (bit >> 3) + 4], "big") << (bit & 7)
        return (window & 0xFFFFFFFF) >> (32 - n_bits)

    def amplitude(size):  # a number of that many bits, negative ones with a leading zero
        value = peek(size) if size else 0
        return value if not size or value >> (size - 1) else value - (1 << size) + 1

    for block in blocks:
        for c, (first_table, other_table) in enumerate(tables):
            length, size = first_table[peek(16)]
            bit += length
            previous[c] += amplitude(size)
            bit += size
            block[c, 0] = previous[c]
            k = 1
            while k < 64:
                length, symbol = other_table[peek(16)]
                bit += length
                if symbol == 0:  # the rest is zeros
                    break
                k += symbol >> 4  # zeros before the next value
                block[c, k] = amplitude(symbol & 15)
                bit += symbol & 15
                k += 1
    return blocks


def ycc_to_rgb(image):
    """Brightness and two color differences to red, green and blue (JFIF), uint8."""
    y, blue, red = image[..., 0], image[..., 1] - 128, image[..., 2] - 128
    rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
