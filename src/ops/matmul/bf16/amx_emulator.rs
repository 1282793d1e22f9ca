//! AMX in software, so that tests run the real machine code of [`super::amx`] on processors without it.
//!
//! Such a processor raises SIGILL at an AMX instruction. The handler decodes the instruction, executes it on emulated
//! tiles of this thread, and continues after it. Instructions that a processor would refuse stay refused: the handler
//! then restores the default action, and the test run ends. Encodings and semantics: Intel's Software Developer's
//! Manual, volume 2 (`LDTILECFG`, `TDPBF16PS`, ...). The handler neither allocates nor locks.

use std::{
    cell::{Cell, UnsafeCell},
    ffi::c_int,
    sync::Once,
};

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
    static UNIT: UnsafeCell<Unit> = const { UnsafeCell::new(Unit::RELEASED) };
}

/// Whether this thread emulates AMX.
pub fn active() -> bool {
    ACTIVE.get()
}

/// Runs `test` as on a machine with AMX; natively if the machine has it.
pub fn with_amx<R>(test: impl FnOnce() -> R) -> R {
    if !crate::runtime::amx_bf16() {
        install();
    }
    let before = ACTIVE.replace(true);
    let result = test();
    ACTIVE.set(before);
    result
}

fn install() {
    static ONCE: Once = Once::new();
    // SAFETY: an all-zero sigaction is valid, and `handle` has the signature that SA_SIGINFO asks for.
    ONCE.call_once(|| unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
    });
}

extern "C" fn handle(_: c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the registers of the stopped thread, and waits until they are changed.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = libc::REG_RIP as usize;
    let mut code = Code { at: registers[rip] as *const u8, registers };
    // SAFETY: the tiles belong to this thread, and only this handler, which SIGILL does not interrupt, touches them.
    let done = code.instruction().and_then(|i| UNIT.with(|unit| unsafe { (*unit.get()).run(i) }));
    let next = code.at as i64;
    match done {
        Some(()) => registers[rip] = next,
        // SAFETY: the default action: the instruction traps again, and ends the process.
        None => unsafe {
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        },
    }
}

#[derive(Clone, Copy)]
enum Instruction {
    Configure { address: usize },
    Release,
    Zero { tile: usize },
    Load { tile: usize, address: usize, stride: usize },
    Store { tile: usize, address: usize, stride: usize },
    Multiply { c: usize, a: usize, b: usize },
}

/// The machine code at the instruction pointer of a thread.
struct Code<'a> {
    at: *const u8,
    registers: &'a [i64; 23],
}

impl Code<'_> {
    fn byte(&mut self) -> u8 {
        // SAFETY: the processor has decoded these bytes as (the beginning of) an instruction.
        unsafe {
            let byte = *self.at;
            self.at = self.at.add(1);
            byte
        }
    }

    /// An AMX instruction: three-byte VEX prefix, opcode, ModRM and, with memory, SIB and displacement.
    fn instruction(&mut self) -> Option<Instruction> {
        const MAP_0F38: u8 = 2;
        if self.byte() != 0xc4 {
            return None;
        }
        let (inverted, last) = (!self.byte(), self.byte());
        let (r, x, b, map) = (inverted >> 7, inverted >> 6 & 1, inverted >> 5 & 1, !inverted & 31);
        let (w, v, l, prefix) = (last >> 7, !last >> 3 & 15, last >> 2 & 1, last & 3);
        let opcode = self.byte();
        let modrm = self.byte();
        let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
        if (map, w, l, r) != (MAP_0F38, 0, 0, 0) {
            return None;
        }
        let tile = usize::from(reg);
        match (opcode, prefix, mode) {
            (0x49, 0, 3) if modrm == 0xc0 && v == 0 => Some(Instruction::Release),
            (0x49, 0, 0..3) if reg == 0 && v == 0 => {
                let (address, _) = self.memory(mode, rm, x, b)?;
                Some(Instruction::Configure { address })
            }
            (0x49, 3, 3) if rm == 0 && v == 0 => Some(Instruction::Zero { tile }),
            (0x4b, 2 | 3, 0..3) if rm == 4 && v == 0 => {
                let (address, stride) = self.memory(mode, rm, x, b)?;
                Some(match prefix {
                    3 => Instruction::Load { tile, address, stride },
                    _ => Instruction::Store { tile, address, stride },
                })
            }
            (0x5c, 2, 3) if b == 0 && v < 8 => {
                Some(Instruction::Multiply { c: tile, a: usize::from(rm), b: usize::from(v) })
            }
            _ => None,
        }
    }

    /// Base + displacement, and the scaled index, which for rows of a tile is their distance. Not relative to RIP.
    fn memory(&mut self, mode: u8, rm: u8, x: u8, b: u8) -> Option<(usize, usize)> {
        let (mut base, mut index) = (rm, 0);
        if rm == 4 {
            let sib = self.byte();
            base = sib & 7;
            let number = sib >> 3 & 7 | x << 3;
            if number != 4 {
                index = self.register(number) << (sib >> 6);
            }
        }
        if mode == 0 && base == 5 {
            return None;
        }
        let displacement = match mode {
            0 => 0,
            1 => self.byte() as i8 as isize,
            _ => i32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]) as isize,
        };
        Some((self.register(base | b << 3).wrapping_add_signed(displacement), index))
    }

    fn register(&self, number: u8) -> usize {
        const NAMES: [c_int; 16] = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        self.registers[NAMES[usize::from(number)] as usize] as usize
    }
}

#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    /// Bytes per row.
    width: usize,
    words: [[u32; 16]; 16],
}

/// The tile registers of a thread.
struct Unit {
    configured: bool,
    tiles: [Tile; 8],
}

impl Unit {
    const RELEASED: Self = Self { configured: false, tiles: [Tile { rows: 0, width: 0, words: [[0; 16]; 16] }; 8] };

    /// Executes an instruction; `None` where a processor would raise an exception.
    ///
    /// # Safety
    /// The instruction's memory is valid, as for the processor.
    unsafe fn run(&mut self, instruction: Instruction) -> Option<()> {
        match instruction {
            Instruction::Release => *self = Self::RELEASED,
            // SAFETY: the caller's promise, here and below.
            Instruction::Configure { address } => unsafe { self.configure(&*(address as *const [u8; 64]))? },
            Instruction::Zero { tile } => self.tile(tile)?.words = [[0; 16]; 16],
            Instruction::Load { tile, address, stride } => {
                let tile = self.tile(tile)?;
                tile.words = [[0; 16]; 16];
                for (i, row) in tile.words.iter_mut().enumerate().take(tile.rows) {
                    let from = address.wrapping_add(i.wrapping_mul(stride)) as *const u8;
                    unsafe { row.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from, tile.width) }
                }
            }
            Instruction::Store { tile, address, stride } => {
                let tile = self.tile(tile)?;
                for (i, row) in tile.words.iter().enumerate().take(tile.rows) {
                    let to = address.wrapping_add(i.wrapping_mul(stride)) as *mut u8;
                    unsafe { to.copy_from_nonoverlapping(row.as_ptr().cast(), tile.width) }
                }
            }
            Instruction::Multiply { c, a, b } => self.multiply(c, a, b)?,
        }
        Some(())
    }

    fn tile(&mut self, number: usize) -> Option<&mut Tile> {
        let tile = self.tiles.get_mut(number)?;
        (self.configured && tile.rows > 0 && tile.width > 0).then_some(tile)
    }

    fn configure(&mut self, memory: &[u8; 64]) -> Option<()> {
        *self = Self::RELEASED;
        let unused = memory[1..16].iter().chain(&memory[32..48]).chain(&memory[56..]);
        if memory[0] != 1 || unused.copied().any(|byte| byte != 0) {
            return None;
        }
        for (i, tile) in self.tiles.iter_mut().enumerate() {
            tile.width = usize::from(u16::from_le_bytes([memory[16 + 2 * i], memory[17 + 2 * i]]));
            tile.rows = usize::from(memory[48 + i]);
            if tile.width > 64 || tile.rows > 16 || (tile.width == 0) != (tile.rows == 0) {
                return None;
            }
        }
        self.configured = true;
        Some(())
    }

    /// C += A·B: each row of C sums the even and the odd steps separately, and adds both to the old content at the end.
    fn multiply(&mut self, c: usize, a: usize, b: usize) -> Option<()> {
        let (a, b) = match (a == b, a == c, b == c) {
            (false, false, false) => (*self.tile(a)?, *self.tile(b)?),
            _ => return None,
        };
        let c = self.tile(c)?;
        let fits = a.rows == c.rows && b.width == c.width && a.width == 4 * b.rows;
        if !fits || !a.width.is_multiple_of(4) || !c.width.is_multiple_of(4) {
            return None;
        }
        for (row, a) in c.words.iter_mut().zip(&a.words).take(c.rows) {
            let mut sums = [[0f32; 2]; 16];
            for (&a, b) in a.iter().zip(&b.words).take(b.rows) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    sum[0] = flush(number(a << 16).mul_add(number(b << 16), sum[0]));
                    sum[1] = flush(number(a & 0xffff_0000).mul_add(number(b & 0xffff_0000), sum[1]));
                }
            }
            for (c, [even, odd]) in row.iter_mut().zip(sums).take(c.width / 4) {
                *c = flush(number(*c) + flush(even + odd)).to_bits();
            }
        }
        c.words[c.rows..].fill([0; 16]);
        Some(())
    }
}

/// The number with these bits; denormals become zero.
fn number(bits: u32) -> f32 {
    flush(f32::from_bits(bits))
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::arch::asm;

    /// 16 rows of 64 bytes.
    #[repr(align(64))]
    struct Memory<T>(T);

    fn shape(rows: [u8; 3], bytes: [u16; 3]) -> Memory<[u8; 64]> {
        let mut memory = Memory([0; 64]);
        memory.0[0] = 1;
        for i in 0..3 {
            memory.0[16 + 2 * i..18 + 2 * i].copy_from_slice(&bytes[i].to_le_bytes());
            memory.0[48 + i] = rows[i];
        }
        memory
    }

    /// All forms of addresses that an assembler writes, low and high registers; only 5 rows of 24 bytes are moved.
    #[test]
    fn tiles_load_and_store_the_configured_rows() {
        let shape = shape([5, 0, 0], [24, 0, 0]);
        let from: [u8; 512] = std::array::from_fn(|i| i as u8 ^ 0x5a);
        let mut to = [[0xeeu8; 1024]; 4];
        with_amx(|| unsafe {
            asm!(
                "ldtilecfg [{shape}]",
                "tilezero tmm0",
                "tileloadd tmm0, [r13 + r14*2 + 3]",
                "tilestored [{a} + r15], tmm0",
                "tilestored [r12 + r15 - 4], tmm0",
                "tilestored [{c} + r15*4 + 200], tmm0",
                "tilezero tmm0",
                "tilestored [{d} + r15], tmm0",
                "tilerelease",
                shape = in(reg) &raw const shape,
                a = in(reg) to[0].as_mut_ptr(),
                c = in(reg) to[2].as_mut_ptr(),
                d = in(reg) to[3].as_mut_ptr(),
                in("r12") to[1].as_mut_ptr().wrapping_add(100),
                in("r13") from.as_ptr(),
                in("r14") 32usize,
                in("r15") 48usize,
                options(nostack)
            );
        });
        let places = [(0, 48), (96, 48), (200, 192), (0, 48)];
        for (case, ((start, stride), to)) in places.into_iter().zip(to).enumerate() {
            let mut expected = [0xee; 1024];
            for row in 0..5 {
                for i in 0..24 {
                    expected[start + row * stride + i] = if case == 3 { 0 } else { from[3 + row * 64 + i] };
                }
            }
            assert_eq!(to, expected, "case {case}");
        }
    }

    /// C (2 × 3) += A (2 × 2 pairs) · B (2 pairs × 3), by hand.
    fn multiply(c: [f32; 6], a: [f32; 8], b: [f32; 12]) -> [f32; 6] {
        let shape = shape([2, 2, 2], [12, 8, 12]);
        let half = |x: f32| half::bf16::from_f32(x).to_bits();
        let (mut c, a, b) = (c, a.map(half), b.map(half));
        with_amx(|| unsafe {
            asm!(
                "ldtilecfg [{shape}]",
                "tileloadd tmm0, [{c} + {wide}]",
                "tileloadd tmm1, [{a} + {narrow}]",
                "tileloadd tmm2, [{b} + {wide}]",
                "tdpbf16ps tmm0, tmm1, tmm2",
                "tilestored [{c} + {wide}], tmm0",
                "tilerelease",
                shape = in(reg) &raw const shape,
                a = in(reg) a.as_ptr(),
                b = in(reg) b.as_ptr(),
                c = in(reg) c.as_mut_ptr(),
                wide = in(reg) 12usize,
                narrow = in(reg) 8usize,
                options(nostack)
            );
        });
        c
    }

    #[test]
    fn products_are_of_pairs() {
        let a = [1.0, 2.0, 3.0, 4.0, -1.0, 0.5, 0.0, 8.0];
        // Columns (1, 10, 100, 1000), (2, 0, 0, 1), (0, 0, 1, 0) in pairs of steps.
        let b = [1.0, 10.0, 2.0, 0.0, 0.0, 0.0, 100.0, 1000.0, 0.0, 1.0, 1.0, 0.0];
        let c = multiply([0.5, 0.0, 0.0, 0.0, 0.0, -7.0], a, b);
        assert_eq!(c, [4321.5, 6.0, 3.0, 8004.0, 6.0, -7.0]);
    }

    #[test]
    fn denormals_are_zero_and_sums_round_to_even() {
        let tiny = f32::from_bits(0x0040_0000);
        let small = f32::from_bits(0x0080_0000);
        let step = 2f32.powi(-24);
        // 1 + 2⁻²⁴ is a tie and goes to the even 1; 1 + 2⁻²³ + 2⁻²⁴ goes up.
        let c = multiply(
            [1.0, 1.0 + 2.0 * step, tiny, 0.0, 0.0, 0.0],
            [1.0, 0.0, 0.0, 0.0, small, tiny, 0.0, 0.0],
            [step, 0.0, step, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        );
        assert_eq!(c[..3], [1.0, 1.0 + 4.0 * step, 0.0]);
        let c = multiply(
            [0.0; 6],
            [small, tiny, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.5, 1e30, 1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        );
        assert_eq!(c[..3], [0.0, small, 2.0 * small]);
    }
}
