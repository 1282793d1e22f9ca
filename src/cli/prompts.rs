//! Reads the prompts of `vilg t2i` from the command line, from stdin or from a file with one prompt on each line.

use crate::{
    bounded_read,
    error::{Hint, Result, ensure, usage},
};
use std::{
    io::{Read, stdin},
    path::Path,
};

/// Maximum size of a prompt file, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// Collects the prompts of `texts`, where `-` stands for the lines of stdin, followed by the prompts of `file` (`-`:
/// stdin).
///
/// # Errors
/// The text cannot be read, is not UTF-8 or is too large; there is no prompt, or a prompt is empty.
pub fn collect(texts: &[String], file: Option<&Path>) -> Result<Vec<String>> {
    let mut prompts = Vec::new();
    for text in texts {
        match text.as_str() {
            "-" => prompts.extend(lines(stdin().lock(), "stdin")?),
            text if text.trim().is_empty() => return Err(empty()),
            text => prompts.push(text.to_owned()),
        }
    }
    match file {
        Some(file) if file == Path::new("-") => prompts.extend(lines(stdin().lock(), "stdin")?),
        Some(file) => {
            let name = file.display().to_string();
            let bytes = bounded_read::read_stream(file, MAX_BYTES)
                .hint(format_args!("cannot read {name}"), "--prompts needs a text file of at most 16 MB")?;
            prompts.extend(lines(&bytes[..], &name)?);
        }
        None => {}
    }
    ensure!(!prompts.is_empty(), empty());
    Ok(prompts)
}

/// The prompts of a text, one on each line. Empty lines are skipped.
fn lines(reader: impl Read, name: &str) -> Result<Vec<String>> {
    let mut bytes = Vec::new();
    let read = reader.take(MAX_BYTES + 1).read_to_end(&mut bytes);
    read.hint(format_args!("cannot read {name}"), "prompts must be lines of text")?;
    let hint = "split the prompts into several files";
    ensure!(bytes.len() as u64 <= MAX_BYTES, usage(format_args!("{name} is larger than {} MB", MAX_BYTES >> 20), hint));
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text,
        Err(e) => {
            let line = 1 + bytes[..e.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
            return Err(usage(format_args!("{name}, line {line}: not UTF-8"), "save the prompts as UTF-8 text"));
        }
    };
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
    let prompts: Vec<String> = lines.map(str::to_owned).collect();
    ensure!(!prompts.is_empty(), usage(format_args!("there is no prompt in {name}"), "write one prompt on each line"));
    Ok(prompts)
}

/// The error for an empty prompt.
pub fn empty() -> crate::error::Error {
    usage("the prompt is empty", "say what to generate: vilg t2i 现代风格的彩虹")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_prompt_on_each_line() {
        let text = "\u{feff}一弯月\r\n\n  星 \n".as_bytes();
        assert_eq!(lines(text, "a").unwrap(), ["一弯月", "星"]);
        let error = |bytes: &[u8]| lines(bytes, "a.txt").unwrap_err().to_string();
        assert_eq!(error(b"moon\n\xff\n"), "a.txt, line 2: not UTF-8");
        assert!(error(b" \n").contains("no prompt in a.txt"));
        assert!(lines(std::io::repeat(b'a'), "a").unwrap_err().to_string().contains("larger than 16 MB"));
    }

    #[test]
    fn files_and_arguments_together() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.txt");
        std::fs::write(&file, "月\n星\n").unwrap();
        assert_eq!(collect(&["红".to_owned()], Some(&file)).unwrap(), ["红", "月", "星"]);
        for (texts, file) in
            [(vec![" "], None), (vec!["月"], Some(folder.path())), (vec![], Some(Path::new("/nowhere")))]
        {
            let texts: Vec<String> = texts.into_iter().map(str::to_owned).collect();
            assert!(crate::error::hint_of(&collect(&texts, file).unwrap_err()).is_some());
        }
    }
}
