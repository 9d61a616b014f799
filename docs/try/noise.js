// torch.Generator("cpu").manual_seed(seed) and torch.randn, as cascade_rt/noise.py has them.

const { fround } = Math;

export class TorchNoise {
  /** @param {bigint} seed 0..2**64-1; as in torch, the low 32 bits count. */
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = Number(seed & 0xffffffffn);
    for (let i = 1; i < 624; i += 1) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = 624;
  }

  /** The next 32 bits of MT19937. */
  bits() {
    if (this.next === 624) this.refill();
    let y = this.state[this.next];
    this.next += 1;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  refill() {
    const s = this.state;
    for (let i = 0; i < 624; i += 1) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
      s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  /** Standard normal numbers; torch makes them in blocks of sixteen. */
  normal(count) {
    if (count % 16) throw new Error(`${count} numbers are no blocks of sixteen`);
    const out = new Float32Array(count);
    for (let i = 0; i < count; i += 1) out[i] = (this.bits() & 0xffffff) * 2 ** -24;
    for (let block = 0; block < count; block += 16) {
      for (let i = block; i < block + 8; i += 1) {
        const radius = fround(Math.sqrt(fround(-2 * fround(Math.log(fround(1 - out[i]))))));
        const angle = fround(fround(2 * Math.PI) * out[i + 8]);
        out[i] = radius * fround(Math.cos(angle));
        out[i + 8] = radius * fround(Math.sin(angle));
      }
    }
    return out;
  }
}
