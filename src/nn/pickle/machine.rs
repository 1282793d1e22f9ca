//! The stack machine that interprets a pickle.

use super::object::{At, Object};
use crate::error::{Context, Hint, Result, bail};
use std::collections::HashMap;

const HINT: &str =
    "a checkpoint of tensors needs no such call: do not trust the file, or save its `state_dict()` alone";

/// Approximate maximum memory of the objects of one pickle, in bytes: a checkpoint with 10,000 tensors takes 10 MB.
pub(super) const BUDGET: usize = 90 << 20;
/// Maximum memory that one operation adds, besides texts: an object and a short list, or an entry in the memo.
const OPERATION: usize = size_of::<Object>() + 32;

/// The functions that checkpoints call.
const CALLS: &[(&str, &str)] = &[
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    // The options of a training script next to its weights; they are ignored.
    ("argparse", "Namespace"),
    ("builtins", "set"),
    ("__builtin__", "set"),
];

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<At>,
    /// Stack heights of the marks.
    marks: Vec<usize>,
    memo: HashMap<usize, At>,
    /// Remaining part of [`BUDGET`].
    left: usize,
}

/// Interprets the pickle at the start of `bytes`; returns its objects, the result, and the length in bytes.
///
/// # Errors
/// As [`super::Pickle::read`].
pub(super) fn run(bytes: &[u8]) -> Result<(Vec<Object>, At, usize)> {
    let (objects, stack, marks) = (Vec::new(), Vec::new(), Vec::new());
    let mut machine = Machine { bytes, at: 0, objects, stack, marks, memo: HashMap::new(), left: BUDGET };
    let root = machine.run()?;
    Ok((machine.objects, root, machine.at))
}

impl Machine<'_> {
    fn run(&mut self) -> Result<At> {
        loop {
            let (place, code) = (self.at, self.byte()?);
            self.charge(OPERATION)?;
            if code == b'.' {
                return self.pop();
            }
            self.step(code).with_context(|| format!("at byte {place} of the pickle"))?;
        }
    }

    fn step(&mut self, code: u8) -> Result<()> {
        match code {
            0x80 => drop(self.byte()?),  // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'N' => self.push(Object::None),
            0x88 => self.push(Object::Bool(true)),
            0x89 => self.push(Object::Bool(false)),
            b'J' => self.integer(4, true)?,
            b'K' => self.integer(1, false)?,
            b'M' => self.integer(2, false)?,
            0x8a => {
                // LONG1
                match usize::from(self.byte()?) {
                    length @ 0..=8 => self.integer(length, true)?,
                    // Too long for the size of a tensor.
                    length => {
                        self.take(length)?;
                        self.push(Object::None);
                    }
                }
            }
            b'G' => {
                let bits: [u8; 8] = self.take(8)?.try_into()?;
                self.push(Object::Float(f64::from_be_bytes(bits)));
            }
            b'X' => self.text(4)?,
            0x8c | b'U' => self.text(1)?,
            b'T' => self.text(4)?,
            0x8d => self.text(8)?,
            b'C' => self.binary(1)?,
            b'B' => self.binary(4)?,
            0x8e => self.binary(8)?,
            b')' | b']' | 0x8f => self.push(Object::List(Vec::new())),
            0x85..=0x87 => self.tuple(usize::from(code - 0x84))?,
            b't' | b'l' | 0x91 => {
                let items = self.above_mark()?;
                self.push(Object::List(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.above_mark()?;
                self.append(items)?;
            }
            b'}' => self.push(Object::Dict(Vec::new())),
            b'd' => {
                let items = self.above_mark()?;
                self.push(Object::Dict(Vec::new()));
                self.insert(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])?;
            }
            b'u' => {
                let items = self.above_mark()?;
                self.insert(&items)?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.above_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'q' => self.remember(1)?,
            b'r' => self.remember(4)?,
            0x94 => {
                let top = self.top()?;
                self.memo.insert(self.memo.len(), top);
            }
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(module, name));
            }
            0x93 => {
                // STACK_GLOBAL
                let (name, module) = (self.pop()?, self.pop()?);
                let length = self.text_length(module) + self.text_length(name);
                self.charge(length)?;
                let global = match (&self.objects[module.0], &self.objects[name.0]) {
                    (Object::Text(module), Object::Text(name)) => Object::Global(module.clone(), name.clone()),
                    _ => bail!("the function has no name"),
                };
                self.push(global);
            }
            b'R' | 0x81 => self.call()?,
            b'b' => self.build()?,
            b'Q' => {
                let id = self.pop()?;
                self.push(Object::Persistent(id));
            }
            other => bail!("checkpoints do not use the operation 0x{other:02x}"),
        }
        Ok(())
    }

    /// REDUCE and NEWOBJ: records a call.
    fn call(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Object::Global(module, name) = &self.objects[function.0] else { bail!("a call of what is no function") };
        let known = CALLS.contains(&(module.as_str(), name.as_str()));
        known.then_some(()).hint(format!("the file would call `{module}.{name}`"), HINT)?;
        let ordered = name == "OrderedDict";
        self.push(if ordered { Object::Dict(Vec::new()) } else { Object::Call { function, arguments, state: None } });
        Ok(())
    }

    /// BUILD: sets the state of an object made by a call. Attributes of a dictionary (torch's `_metadata`) are ignored.
    fn build(&mut self) -> Result<()> {
        let (new, object) = (self.pop()?, self.top()?);
        match &mut self.objects[object.0] {
            Object::Call { state, .. } => *state = Some(new),
            Object::Dict(_) => {}
            _ => bail!("this object has no state to set"),
        }
        Ok(())
    }

    /// Subtracts the size of a new object from the budget.
    fn charge(&mut self, bytes: usize) -> Result<()> {
        let left = self.left.checked_sub(bytes);
        let hint = "it is damaged or made to exhaust memory: save the weights alone, as a safetensors file or a `state_dict()`";
        self.left = left.hint(format!("the objects of the pickle need more than {} MB", BUDGET >> 20), hint)?;
        Ok(())
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len()).context("the pickle is cut off")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian number of `width` bytes.
    fn number(&mut self, width: usize) -> Result<u64> {
        Ok(self.take(width)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn integer(&mut self, width: usize, signed: bool) -> Result<()> {
        let number = self.number(width)?;
        let unused = 64 - 8 * width.clamp(1, 8) as u32;
        let value = if signed { (number << unused) as i64 >> unused } else { number as i64 };
        self.push(Object::Int(value));
        Ok(())
    }

    /// A line of text without its newline.
    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').context("the pickle is cut off")?;
        self.charge(length * 3)?;
        let line = self.take(length + 1)?;
        Ok(String::from_utf8_lossy(&line[..length]).trim_end_matches('\r').to_owned())
    }

    fn binary(&mut self, width: usize) -> Result<()> {
        let length = usize::try_from(self.number(width)?)?;
        self.take(length)?;
        self.push(Object::Bytes(self.at - length..self.at));
        Ok(())
    }

    fn text(&mut self, width: usize) -> Result<()> {
        let length = usize::try_from(self.number(width)?)?;
        // Bytes that are not UTF-8 may become three times as long.
        self.charge(length.min(self.bytes.len()) * 3)?;
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.push(Object::Text(text));
        Ok(())
    }

    fn text_length(&self, at: At) -> usize {
        match &self.objects[at.0] {
            Object::Text(text) => text.len(),
            _ => 0,
        }
    }

    fn tuple(&mut self, count: usize) -> Result<()> {
        let from = self.stack.len().checked_sub(count).context("the stack is empty")?;
        let items = self.stack.split_off(from);
        self.push(Object::List(items));
        Ok(())
    }

    fn append(&mut self, mut items: Vec<At>) -> Result<()> {
        let list = self.top()?;
        let Object::List(list) = &mut self.objects[list.0] else { bail!("an item for what is no list") };
        list.append(&mut items);
        Ok(())
    }

    fn insert(&mut self, items: &[At]) -> Result<()> {
        let dict = self.top()?;
        let Object::Dict(entries) = &mut self.objects[dict.0] else { bail!("an entry for what is no dictionary") };
        entries.extend(items.as_chunks().0.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn remember(&mut self, width: usize) -> Result<()> {
        let (key, top) = (self.number(width)? as usize, self.top()?);
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, width: usize) -> Result<()> {
        let key = self.number(width)? as usize;
        let object = *self.memo.get(&key).context("a reference to nothing")?;
        self.stack.push(object);
        Ok(())
    }

    fn above_mark(&mut self) -> Result<Vec<At>> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).context("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn push(&mut self, object: Object) {
        self.stack.push(At(self.objects.len()));
        self.objects.push(object);
    }

    fn pop(&mut self) -> Result<At> {
        self.stack.pop().context("the stack is empty")
    }

    fn top(&self) -> Result<At> {
        self.stack.last().copied().context("the stack is empty")
    }
}
