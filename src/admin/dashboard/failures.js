// Requests that failed lately, where the server keeps them.
export class Failures {
  render() {}
}
