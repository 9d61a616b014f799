// Prompt -> token ids, for a tokenizer of whole words (NFKC, lower case, words and marks), as the tiny bundle has it.

const WORD = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d\s]+/gu;

export class Words {
  constructor(file, record) {
    if (file.model.type !== "WordLevel" || file.pre_tokenizer.type !== "Whitespace") {
      throw new Error(`a tokenizer of the kind ${file.model.type} is not read here; the tiny bundle has WordLevel`);
    }
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.unknown = this.vocabulary.get(file.model.unk_token);
    const marks = file.post_processor.single.filter((part) => part.SpecialToken);
    [this.start, this.end] = marks.map((part) => this.vocabulary.get(part.SpecialToken.id));
    this.length = record.max_length;
    this.pad = record.pad_id;
  }

  /** `{ids, mask}`, each of the fixed length; what does not fit is cut off. */
  encode(text) {
    const words = text.normalize("NFKC").toLowerCase().match(WORD) ?? [];
    const inner = words.map((word) => this.vocabulary.get(word) ?? this.unknown);
    const tokens = [this.start, ...inner.slice(0, this.length - 2), this.end];
    const row = (fill, value) => Array.from({ length: this.length }, (_, i) => BigInt(i < tokens.length ? value(i) : fill));
    return { ids: row(this.pad, (i) => tokens[i]), mask: row(0, () => 1) };
  }
}
