//! What the pages say about each kind of study, in Chinese and English.

use crate::eval::human::kind::Kind;

/// A text in both languages.
pub type Both = (&'static str, &'static str);

/// What a rater has to do.
pub fn task(kind: Kind) -> Both {
    match kind {
        Kind::Images => (
            "每页有一句描述和根据它生成的图像。请分别为每张图像打分，不必与其他页比较。",
            "Each page has a description and images generated from it. Rate each image on its own.",
        ),
        Kind::Captions => (
            "每页有一张图像和一句对它的描述。请为这句描述打分。同一张图像可能会再次出现，描述不同。",
            "Each page has an image and a caption. Rate the caption. An image may come again with another caption.",
        ),
        Kind::Answers => (
            "每页有一张图像、一个问题和一个回答。有些回答是机器写的，有些是人写的。请为回答打分，并判断它是谁写的。",
            "Each page has an image, a question and an answer, written by a machine or by a person. Rate the answer and say \
             which of them you think wrote it.",
        ),
    }
}

/// The text of a question, by its name.
pub fn question(kind: Kind, name: &str) -> Both {
    match (kind, name) {
        (Kind::Images, "clarity") => ("清晰度：图像是否清晰？", "Clarity: is the image sharp and clean?"),
        (Kind::Images, "texture") => ("质感：纹理和细节是否真实自然？", "Texture: are textures and details natural?"),
        (Kind::Images, _) => ("相关性：图像是否符合描述？", "Relevance: does the image match the description?"),
        (Kind::Captions, "fluency") => ("流畅性：句子是否通顺？", "Fluency: is the sentence fluent?"),
        (Kind::Captions, "relevance") => ("相关性：是否与图像相符？", "Relevance: does it match the image?"),
        (Kind::Captions, _) => ("丰富性：内容是否丰富具体？", "Richness: is it rich in detail?"),
        (Kind::Answers, "quality") => ("质量：回答是否正确、合适？", "Quality: is the answer right and appropriate?"),
        (Kind::Answers, _) => ("这个回答是谁写的？", "Who wrote this answer?"),
    }
}

/// What an answer to a question means.
pub fn step(kind: Kind, question: &str, value: i64) -> Both {
    match (kind, question, value) {
        (Kind::Images, _, 1) => ("很差", "bad"),
        (Kind::Images, _, 2) => ("较差", "poor"),
        (Kind::Images, _, 3) => ("一般", "fair"),
        (Kind::Images, _, 4) => ("较好", "good"),
        (Kind::Images, _, _) => ("很好", "excellent"),
        (Kind::Answers, "person", 0) => ("机器", "a machine"),
        (Kind::Answers, "person", _) => ("人", "a person"),
        (_, _, 0) => ("差", "bad"),
        (_, _, 1) => ("一般", "fair"),
        (_, _, _) => ("好", "good"),
    }
}
